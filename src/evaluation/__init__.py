"""From text to numbers, tables and pictures."""

from src.evaluation.data_checks import add_model_checks, choose_label_case
from src.evaluation.evaluator import ModelEvaluator
from src.evaluation.guard import GuardSet, evaluate_guard, prepare_guard_set
from src.evaluation.live_plot import LivePlot
from src.evaluation.metrics import MetricsCalculator
from src.evaluation.report import comparison_table, describe_comparison, summarize_run
from src.evaluation.results import EvaluationResult
from src.evaluation.streaming import evaluate_stream, make_stream
from src.evaluation.visualization import EvaluationVisualizer, TrainingVisualizer

__all__ = [
    "EvaluationResult",
    "EvaluationVisualizer",
    "GuardSet",
    "LivePlot",
    "MetricsCalculator",
    "ModelEvaluator",
    "TrainingVisualizer",
    "add_model_checks",
    "choose_label_case",
    "comparison_table",
    "describe_comparison",
    "evaluate_guard",
    "evaluate_stream",
    "make_stream",
    "prepare_guard_set",
    "summarize_run",
]
