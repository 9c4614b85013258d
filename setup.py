"The distribution, described by settings.ini; data/ travels in the wheel as the package exp.standins."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(root/"settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]

# Everything tracked under data/ except the fetched sets.
standins = [str(p.relative_to(root/"data")) for p in sorted((root/"data").rglob("*"))
            if p.is_file() and "cache" not in p.relative_to(root/"data").parts[:1]]

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"],
    long_description=(root/"README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    author=cfg["author"], author_email=cfg["author_email"], url=cfg["git_url"],
    license="Apache-2.0", license_files=["LICENSE"], keywords=cfg["keywords"].split(),
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Education", "Programming Language :: Python :: 3",
                 "Topic :: Scientific/Engineering :: Artificial Intelligence"],
    packages=find_packages(include=["exp", "exp.*"]) + ["exp.standins"],
    package_dir={"exp.standins": "data"}, package_data={"exp.standins": standins},
    python_requires=f'>={cfg["min_python"]}',
    install_requires=cfg["requirements"].split(), extras_require={"dev": cfg["dev_requirements"].split(), "fast": ["simplejpeg"]},
    zip_safe=False, entry_points={"nbdev": [f'{cfg["lib_path"]}={cfg["lib_path"]}._modidx:d'],
                                  "console_scripts": cfg["console_scripts"].split()},
)
