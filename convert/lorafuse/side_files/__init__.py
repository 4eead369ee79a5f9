"""Which files beside the weights a result gets: everything of the checkpoint that is no weights, training
state, card or hidden file; the tokenizer and its like from one folder each."""
