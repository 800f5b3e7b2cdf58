"""Makes a Python environment without hf-tract, and this process as new for accelerate."""

import site
import subprocess
import sys
import venv
from pathlib import Path


def fresh_python(folder: Path) -> Path:
    """Returns an interpreter that imports transformers and timm, and finds no hf-tract."""
    venv.create(folder, with_pip=False)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    packages = [path for path in (*site.getsitepackages(), site.getusersitepackages()) if Path(path).exists()]
    own = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"], check=True, capture_output=True, text=True
    )
    Path(own.stdout.strip(), "outer.pth").write_text("\n".join(packages))  # whose own .pth files are not read
    check = "from importlib.util import find_spec as f; assert f('transformers') and not f('hf_tract')"
    subprocess.run([python, "-c", check], check=True)
    return python


def reset_accelerate() -> None:
    """Forgets what accelerate keeps for a process, so that the next script or Trainer sets it up anew."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
