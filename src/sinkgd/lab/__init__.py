"""The laboratory: trains, measures and reports with the library (``pip install '.[lab]'``)."""
