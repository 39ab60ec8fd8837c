"""Reports: figures, HTML pages and comparisons of runs. No PyTorch."""

import logging

# Before it is imported, it says at length where it keeps its fonts without a home folder; later, which it lacks.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
