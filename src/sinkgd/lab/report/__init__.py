"""Reports on runs: read their results, compare them, and show the verdict, tables and page."""

from sinkgd.lab.report.analysis import Analysis as Analysis
from sinkgd.lab.report.analysis import Comparison as Comparison
from sinkgd.lab.report.analysis import Reach as Reach
from sinkgd.lab.report.analysis import RecipeSummary as RecipeSummary
from sinkgd.lab.report.analysis import ReportError as ReportError
from sinkgd.lab.report.analysis import Spread as Spread
from sinkgd.lab.report.analysis import analyze as analyze
from sinkgd.lab.report.analysis import default_baseline as default_baseline
from sinkgd.lab.report.analysis import first_reach as first_reach
from sinkgd.lab.report.analysis import read_runs as read_runs
from sinkgd.lab.report.calculator import CalculatorBlock as CalculatorBlock
from sinkgd.lab.report.calculator import calculator_block as calculator_block
from sinkgd.lab.report.page import build_page as build_page
from sinkgd.lab.report.page import write_page as write_page
from sinkgd.lab.report.published_block import PublishedBlock as PublishedBlock
from sinkgd.lab.report.published_block import published_block as published_block
from sinkgd.lab.report.tables import summary_tables as summary_tables
from sinkgd.lab.report.verdict import judge as judge
