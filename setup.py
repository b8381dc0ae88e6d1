"""Finds the packages: everything under gtddp_compile/, and passes/ as gtddp_compile.passes."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["gtddp_compile*"]), "gtddp_compile.passes"])
