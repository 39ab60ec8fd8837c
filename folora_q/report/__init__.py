"""What a run learned and forgot, to be seen: figures, pages and the numbers behind them. No torch."""

import logging

# Before it is imported, it says at length where it keeps its fonts without a home folder; later, which it lacks.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
