"""Exam practice: questions and banks, files of other programs, sessions, grading, repetition, progress, and the model as candidate.

Knows no page and no model but the engine's scoring call.
"""
