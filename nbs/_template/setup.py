"""Packaging, read from settings.ini: the dependencies and pins stand there once."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=["="])
parser.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]


def requirements(key: str) -> list[str]:
    return [line for line in settings[key].splitlines() if line.strip()]


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    packages=find_packages(include=[settings["lib_path"], settings["lib_path"] + ".*"]),
    python_requires=f">={settings['min_python']}",
    install_requires=requirements("requirements"),
    extras_require={"dev": requirements("dev_requirements")},
    entry_points={"nbdev": [f"{settings['lib_name']} = {settings['lib_path']}._modidx:d"]},
)
