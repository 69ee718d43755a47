"""The games that self_play.py trains on. game.py says what a game is; a new one needs a line here and a preset."""

from games.debate import Debate
from games.nim import Nim
from games.tictactoe import TicTacToe

GAMES = {game.name: game for game in (Nim, TicTacToe, Debate)}
