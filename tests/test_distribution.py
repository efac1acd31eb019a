"""What a user gets from an index: the page that shows README.md, and a package that works without the clone."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
from pathlib import Path

import pytest

pytest.importorskip("hatchling", reason="pip install hatchling")

from hatch_build import ProjectMetadata, for_an_index

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ADDRESS = "https://example.org/owner/hf-linear-attn"


class TestReadme:
    """README.md as the index renders it, before and after the repository has a public address."""

    @pytest.mark.parametrize("address", ["", ADDRESS])
    def test_no_link_is_relative_and_no_picture_dead(self, address):
        renderer = pytest.importorskip("readme_renderer.markdown", reason="pip install 'readme-renderer[md]'")
        page = renderer.render(for_an_index(README, address))
        assert page is not None
        targets = re.findall(r'(?:href|src)="([^"]*)"', page)
        assert len(targets) > (30 if address else 5)
        for target in targets:
            assert re.match("https://|#user-content-", target), target
            if address and target.startswith(address):
                kind, head, path = target.removeprefix(f"{address}/").split("/", 2)
                assert (kind, head) == ("raw" if path.startswith("docs/images/") else "blob", "HEAD")
                assert (ROOT / path).exists(), path
        assert page.count("docs/images/") == (2 if address else 0)
        assert "](" not in page
        assert "<table>" in page

    def test_is_short(self):
        assert len(README.splitlines()) <= 150
        assert len(README.encode()) <= 12_000

    def test_badges_are_true(self):
        """They say what pyproject.toml says."""
        words = dict(re.findall(r"^!\[(Python|PyTorch|Transformers|Licence) ([^\]]+)\]", README, flags=re.MULTILINE))
        wanted = {re.split("[><=]", each)[0]: each for each in PROJECT["dependencies"]}
        assert words["Licence"] == PROJECT["license"]
        assert words["Python"] == PROJECT["requires-python"].removeprefix(">=") + "+"
        assert wanted["torch"].startswith(f"torch>={words['PyTorch'].removesuffix('+')},")
        oldest, newest = words["Transformers"].split(" to ")
        major, minor = newest.split(".")
        assert wanted["transformers"] == f"transformers>={oldest},<{major}.{int(minor) + 1}"
        shown = [" ".join(pair) for pair in re.findall(r"badge/(\w+)-([\w.%]+(?:--[\w.]+)?)-blue", README)]
        assert [each.replace("%2B", "+").replace("%20", " ").replace("--", "-").lower() for each in shown] == [
            f"{name} {value}".lower() for name, value in words.items()
        ]

    def test_addresses(self, monkeypatch):
        """From pyproject.toml, or from the environment; none where there is none."""
        for named, given in (("", None), (ADDRESS, None), ("", ADDRESS), ("https://elsewhere", ADDRESS)):
            monkeypatch.delenv("HF_LINEAR_ATTN_REPOSITORY", raising=False)
            if given:
                monkeypatch.setenv("HF_LINEAR_ATTN_REPOSITORY", given)
            metadata: dict = {}
            ProjectMetadata(str(ROOT), {"repository": named}).update(metadata)
            assert metadata.get("urls", {}).get("Repository", "") == (given or named)


def run(*command: object, at: Path, **environment: str) -> str:
    """What a command prints; its words where it fails."""
    done = subprocess.run([str(word) for word in command], cwd=at, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """An empty environment with the wheel of the source distribution; packages that it needs are those of this one."""
    folder = tmp_path_factory.mktemp("distribution")
    home = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "PYTHONPATH": sysconfig.get_path("purelib")}
    home["PYTHONPATH"] = ":".join([str(Path(sys.modules["hatchling"].__file__).parents[1]), home["PYTHONPATH"]])
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, at=ROOT, **home)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    unpacked = next(found for found in folder.iterdir() if found.is_dir())
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, at=unpacked, **home)
    shutil.rmtree(unpacked)
    venv.create(folder / "environment", with_pip=False)
    python = folder / "environment" / "bin" / "python"
    wheel = next(folder.glob("*.whl"))
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        wheel,
        at=folder,
        **home,
    )
    site = next((folder / "environment" / "lib").glob("python*/site-packages"))
    # A path alone: the clone, which this environment knows by a .pth file of its own, is not found there.
    (site / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "environment"


@pytest.mark.skipif(sys.platform == "win32", reason="an environment's programs lie elsewhere there")
class TestInstalled:
    """The wheel, made from the source distribution, without the clone."""

    def command(self, environment: Path, *words: str) -> str:
        quiet = {
            "PATH": "/usr/bin:/bin",
            "HOME": str(environment.parent),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }
        return run(environment / "bin" / words[0], *words[1:], at=environment.parent, **quiet)

    def test_the_command_answers(self, environment):
        assert self.command(environment, "hf-linear-attn", "--version").split()[-1].startswith("0.")

    @pytest.mark.slow
    def test_it_writes_from_its_own_files(self, environment):
        """The package that is imported is the installed one, and the model in it writes."""
        place = self.command(environment, "python", "-c", "import hf_linear_attn; print(hf_linear_attn.__file__)")
        assert Path(place.strip()).is_relative_to(environment)
        assert "8 tokens" in self.command(
            environment, "hf-linear-attn", "generate", "My fellow citizens", "--max-new-tokens", "8"
        )
