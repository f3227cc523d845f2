from .demo import ATLAS, print_results, print_step_cost, write_pictures
from .page import PAGE, table, write_report
from .plots import bank_figure, history_figure, save
from .terminal import print_table, size

__all__ = [
    "ATLAS",
    "PAGE",
    "bank_figure",
    "history_figure",
    "print_results",
    "print_step_cost",
    "print_table",
    "save",
    "size",
    "table",
    "write_pictures",
    "write_report",
]
