"""From text to numbers, tables and pictures."""

from src.evaluation.alignment_view import AlignmentView
from src.evaluation.data_checks import add_model_checks, choose_label_case
from src.evaluation.evaluator import ModelEvaluator
from src.evaluation.figures_variants import variants_chart
from src.evaluation.figures_words import draw_words
from src.evaluation.guard import GuardSet, evaluate_guard, prepare_guard_set
from src.evaluation.html_report import write_html_report
from src.evaluation.latency import LatencyBenchmark, latency_table
from src.evaluation.live_plot import LivePlot
from src.evaluation.metrics import MetricsCalculator
from src.evaluation.model_card import write_model_card
from src.evaluation.report import comparison_table, describe_comparison, summarize_run
from src.evaluation.results import EvaluationResult, ModelComparison
from src.evaluation.slices import slice_rates
from src.evaluation.streaming import evaluate_stream, make_stream
from src.evaluation.variants import compare_models
from src.evaluation.visualization import EvaluationVisualizer, TrainingVisualizer

__all__ = [
    "AlignmentView",
    "EvaluationResult",
    "EvaluationVisualizer",
    "GuardSet",
    "LatencyBenchmark",
    "LivePlot",
    "MetricsCalculator",
    "ModelComparison",
    "ModelEvaluator",
    "TrainingVisualizer",
    "add_model_checks",
    "choose_label_case",
    "compare_models",
    "comparison_table",
    "describe_comparison",
    "draw_words",
    "evaluate_guard",
    "evaluate_stream",
    "latency_table",
    "make_stream",
    "prepare_guard_set",
    "slice_rates",
    "summarize_run",
    "variants_chart",
    "write_html_report",
    "write_model_card",
]
