"""A Flower app that attacks the site it runs at."""
