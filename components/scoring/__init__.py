"""Scores of answers, whoever gave them: benchmarks, intervals, pairs, judges, and the gate."""
