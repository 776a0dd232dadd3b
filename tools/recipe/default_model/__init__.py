"""The recipe of the embedded default model: data, training, export and evaluation."""
