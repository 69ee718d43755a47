"use strict";
// Helpers of every page. The page's own script follows in the same script element.

const get = (id) => document.getElementById(id);
const block = (id) => JSON.parse(get(id).textContent);  // a block of data that Python wrote into the page

// Control characters are written as escapes: some show nothing, some change the direction of the text around them.
const controls = /[\0-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]|\p{Surrogate}/gu;
function printed(text) {
  return text.replace(controls, (c) => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
}

// A new element. Content is elements or values; a value becomes text, never markup, so model text is safe in it.
function make(tag, className, ...content) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...content.map((item) => (item instanceof Node ? item : printed(String(item)))));
  return element;
}

// A new SVG element at the end of `parent`.
function addShape(parent, tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}
