"""Packaging, read from settings.ini: the dependencies and pins stand there once."""

from configparser import ConfigParser
from itertools import chain
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist

parser = ConfigParser(delimiters=["="])
parser.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]


def requirements(key: str) -> list[str]:
    return [line for line in settings[key].splitlines() if line.strip()]


class SourceDistribution(sdist):
    "With the settings, which are read above."

    def make_distribution(self) -> None:
        self.filelist.append("settings.ini")
        super().make_distribution()


extras = {name: requirements(f"{name}_requirements") for name in ("app", "optimizers")}
template = [".gitignore", "README.md", "settings.ini", "setup.py", "nbs/*.ipynb", "my_project/*.py", "tests/*.py"]
setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    license="Apache-2.0",
    keywords=settings["keywords"].split(),
    url=settings["git_url"],
    # The notebooks that `python -m dlnb.new` makes a project of are within the package in a wheel, and stay where they are in a checkout.
    packages=[*find_packages(include=["dlnb", "dlnb.*"]), "dlnb.nbs"],
    package_dir={"dlnb.nbs": "nbs"},
    package_data={
        "dlnb": ["py.typed"],
        "dlnb.nbs": ["dashboard.ipynb", "workflows/*.ipynb", *(f"_template/{pattern}" for pattern in template)],
    },
    cmdclass={"sdist": SourceDistribution},
    python_requires=f">={settings['min_python']}",
    install_requires=requirements("requirements"),
    extras_require={**extras, "dev": [*requirements("dev_requirements"), *chain(*extras.values())]},
    entry_points={
        "papermill.engine": ["dlnb = dlnb.engine:DlnbEngine"],
        "nbdev": ["dlnb = dlnb._modidx:d"],
    },
)
