from .data_checks import add_model_checks, choose_label_case, fill_languages
from .evaluator import EvaluationResult, ModelComparison, ModelEvaluator
from .guard import GuardSet, evaluate_guard, prepare_guard_set
from .latency import LatencyBenchmark, latency_table
from .metrics import Bootstrap, MetricsCalculator
from .report.clips import AlignmentView, Highlights
from .report.html import write_html_report
from .report.model_card import write_model_card
from .report.summary import comparison_table, describe_comparison, headline, summarize_run
from .slices import slice_rates
from .streaming import ReplayClock, evaluate_stream, log_streams, measure_stream, replay, time_words
from .streams import WordAligner, add_noise, join_clips, make_stream
from .variants import compare_models
from .visualization.evaluation import EvaluationVisualizer
from .visualization.speed import draw_emission, draw_tradeoff, variants_chart
from .visualization.training import LivePlot, TrainingVisualizer
from .visualization.words import draw_words

__all__ = [
    "AlignmentView",
    "Bootstrap",
    "EvaluationResult",
    "EvaluationVisualizer",
    "GuardSet",
    "Highlights",
    "LatencyBenchmark",
    "LivePlot",
    "MetricsCalculator",
    "ModelComparison",
    "ModelEvaluator",
    "ReplayClock",
    "TrainingVisualizer",
    "WordAligner",
    "add_model_checks",
    "add_noise",
    "choose_label_case",
    "compare_models",
    "comparison_table",
    "describe_comparison",
    "draw_emission",
    "draw_tradeoff",
    "draw_words",
    "evaluate_guard",
    "evaluate_stream",
    "fill_languages",
    "headline",
    "join_clips",
    "latency_table",
    "log_streams",
    "make_stream",
    "measure_stream",
    "prepare_guard_set",
    "replay",
    "slice_rates",
    "summarize_run",
    "time_words",
    "variants_chart",
    "write_html_report",
    "write_model_card",
]
