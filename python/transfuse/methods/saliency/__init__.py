"""Maps of where in its input a network finds what it decides by."""
