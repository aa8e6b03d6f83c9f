"""How long the engine takes for much output, as a multiple of stock papermill: `python tests/output_speed.py [SHAPE ...]`."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import write_notebook

SHAPES = {
    "one line of 50 MB": "print('x' * 50_000_000)",
    "one line of 50 MB in 50,000 pieces": "for _ in range(50_000):\n    print('x' * 1000, end='')",
    "50 MB of short lines": "for number in range(1_000_000):\n    print(f'{number:049d}')",
    "50 MB of coloured lines": "for number in range(1_000_000):\n    print(f'\\x1b[32m{number:040d}\\x1b[0m')",
    "a million carriage returns": "for number in range(1_000_000):\n    print(f'\\rstep {number}', end='')",
    "20,000 carriage returns, flushed": "for number in range(20_000):\n    print(f'\\rstep {number}', end='', flush=True)",
    "10,000 times stdout, then stderr": "import sys\nfor number in range(10_000):\n    print(number, flush=True)\n"
    "    print(number, file=sys.stderr, flush=True)",
    "5,000 updates of a display": "from IPython.display import display\nhandle = display(0, display_id=True)\n"
    "for number in range(5_000):\n    handle.update(number)",
    "5,000 displays": "from IPython.display import HTML, display\nfor number in range(5_000):\n    display(HTML(f'<b>{number}</b>'))",
}
ENGINES = {"papermill": (), "dlnb": ("--engine", "dlnb")}


def seconds(cell: str, *options: str) -> float:
    "How long papermill takes for a notebook with this cell; infinitely long where it fails."
    with tempfile.TemporaryDirectory() as folder:
        path = write_notebook(Path(folder) / "in.ipynb", "unused = 1", cell)
        command = [sys.executable, "-m", "papermill", str(path), f"{folder}/out.ipynb", "--no-progress-bar", *options]
        began = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        return float("inf") if done.returncode else time.monotonic() - began


def main(names: list[str]) -> None:
    print(f"{'shape':40}{'papermill':>10}{'dlnb':>10}{'ratio':>8}")
    for name in names or SHAPES:
        times = {engine: min(seconds(SHAPES[name], *options) for _ in range(2)) for engine, options in ENGINES.items()}
        ratio = times["dlnb"] / times["papermill"]
        print(f"{name:40}{times['papermill']:8.1f} s{times['dlnb']:8.1f} s{ratio:8.2f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
