"""Words that stand for what a person wrote or was told, one for each place."""

PLACES = (
    *("question", "answer", "system", "start", "title", "search", "handler", "forged", "path", "header"),
    *("bank_stem", "bank_A", "bank_B", "bank_explanation"),
)


def secret(place: str) -> str:
    """The secret of a place: a word in Latin letters and one in Chinese characters."""
    return f"zebrafish{PLACES.index(place):02d}secret 斑马鱼{PLACES.index(place):02d}"


SECRETS = ("zebrafish", "斑马鱼", r"\u6591\u9a6c\u9c7c")
