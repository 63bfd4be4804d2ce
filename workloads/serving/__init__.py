"""Export of trunks with model cards, and prediction with the model of a checkpoint."""
