"""Which views a method sees: recipes, and the drawing of their parameters, the only place with randomness."""
