"""What a run leaves for people to look at: the HTML report, image grids and the before/after picture."""

from tiltflow.report.page import write_report
from tiltflow.report.pictures import before_after_picture, save_grid
from tiltflow.report.reward_page import write_reward_report

__all__ = ["before_after_picture", "save_grid", "write_report", "write_reward_report"]
