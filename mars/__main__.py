"""`python -m mars`: the command `mars`, where no scripts are installed or another Python is meant."""

from mars.cli import mars

mars()
