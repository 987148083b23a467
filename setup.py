"Metadata comes from settings.ini and the version from llamagym/__init__.py; edit those, not this file."

import re
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
parser = ConfigParser(delimiters=["="], interpolation=None)
parser.read(ROOT / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]
package = settings["lib_path"]
init = (ROOT / package / "__init__.py").read_text(encoding="utf-8")
version = re.search(r'^__version__ = "(.+?)"', init, re.MULTILINE)[1]


def lines(key: str) -> list[str]:
    return [line for line in settings[key].splitlines() if line.strip()]


class BuildWithTutorials(build_py):
    "Copies the tutorials into the package, so that `llamagym quickstart` works without a checkout."

    def run(self):
        super().run()
        if self.editable_mode:  # a checkout has them in nbs/tutorials
            return
        target = Path(self.build_lib) / package / "tutorials"
        target.mkdir(parents=True, exist_ok=True)
        for kind in ("*.ipynb", "*.jsonl"):
            for file in sorted((ROOT / "nbs" / "tutorials").glob(kind)):
                shutil.copy2(file, target)


setup(
    version=version,
    keywords=settings["keywords"].split(),
    author=settings["author"],
    license=settings["license"],
    python_requires=f">={settings['min_python']}",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Framework :: Jupyter",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: {v}" for v in settings["python_versions"].split()),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=[package, f"{package}.*"]),
    package_data={package: ["py.typed"], f"{package}.widgets": ["*.js"]},
    install_requires=lines("requirements"),
    extras_require={
        key.removesuffix("_requirements"): lines(key)
        for key in settings
        if key.endswith("_requirements")
    },
    entry_points={
        "console_scripts": lines("console_scripts"),
        "nbdev": [f"{settings['lib_name']} = {package}._modidx:d"],
        f"{package}.callbacks": [
            f"{name} = {package}.widgets.monitor:TrainingMonitor"
            for name in ("monitor", "notebook_display")
        ],
    },
    cmdclass={"build_py": BuildWithTutorials},
)
