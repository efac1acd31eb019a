"""Scripts in a fresh interpreter that knows every installed library except this package."""

import os
import subprocess
import sys


def run_without_package(script, *arguments, folder, **environment) -> subprocess.CompletedProcess:
    """Run a script in a fresh interpreter that has every installed library except this package.

    `-S` leaves out the start-up files that make an editable install visible; the libraries' folders are given by hand.
    """
    libraries = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    offline = {"HF_HUB_OFFLINE": "1"} if "HF_ENDPOINT" not in environment else {}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTEST_"))}
    settings = {
        "PYTHONPATH": os.pathsep.join(libraries),
        "HF_HOME": str(folder / "hf-home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-S", str(script), *map(str, arguments)],
        env=inherited | settings | offline | environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=400,
    )
