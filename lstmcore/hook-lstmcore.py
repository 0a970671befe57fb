"""For PyInstaller, which finds this folder by the entry point in pyproject.toml: the data to take."""

from PyInstaller.utils.hooks import collect_data_files

datas = collect_data_files("lstmcore", includes=["__init__.pyi"])
