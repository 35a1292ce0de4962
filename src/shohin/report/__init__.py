"""What a run has to say: one self-contained HTML page and a model card, made from a run folder."""

from shohin.report.card import card_text, model_card
from shohin.report.collect import collect
from shohin.report.page import render
from shohin.report.schema import ReportData

__all__ = ["ReportData", "card_text", "collect", "model_card", "render"]
