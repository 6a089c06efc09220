"""What the task ``shout`` does with its rows."""


def cleaned(docs):
    """The rows, with the words in small letters."""
    return docs.map(lambda row: {**row, "word": row["word"].lower()})
