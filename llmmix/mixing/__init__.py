"""Which rows a trainer sees: samplers with movable weights, and mixture laws."""
