"""Model passes that measures need. Each gives a table of items (image_id, metric, num, den) for ``alea_lib.stats``."""
