"""The section of docs/measurements.md about the ids of texts in training and after export."""

from scripts.pages.without_gpu import paragraph


def tokenizer_ids(figures):
    readers = {
        "saved": "our own export", "transformers": "transformers", "tokenizers": "tokenizers alone",
        "llama.cpp": "llama.cpp after its converter", "llama.cpp before": "llama.cpp on the GGUF itself",
        "vectors": "llama.cpp's test ids",
    }  # fmt: skip

    def line(name, table):
        cells = ("{} of {:,}".format(*table[reader]) if reader in table else "" for reader in readers)
        return f"| {name} | {' | '.join(cells)} |"

    return [
        paragraph(
            "Every instruction, input and output of the rows, llama.cpp's own test texts and some that trouble "
            "tokenizers are encoded as training does, and by other programs from the exported folder. A cell says "
            "how many texts have other ids, BOS included. The vocabularies are Meta's tokenizer.model, alone and "
            "beside a config that names LlamaTokenizer, and GGUF files."
        ),
        "",
        f"| vocabulary | {' | '.join(readers.values())} |",
        f"|---|{'---|' * len(readers)}",
        *(line(name, table) for name, table in figures["vocabularies"].items()),
    ]
