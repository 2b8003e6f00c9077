"""From raw public releases to the h5 layouts, and to a lower resolution."""
