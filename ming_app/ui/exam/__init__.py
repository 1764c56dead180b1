"""The Exam tab: a visitor's room (room.py), what the card shows (payload.py, static/exam.js), the model's help (tutor.py),
pages of results and statistics (pages.py), and layout with events (tab.py)."""
