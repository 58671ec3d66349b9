"""Files of weights to tensors: lazy checked reading, one key map per family, quantisation, folders, conversion."""
