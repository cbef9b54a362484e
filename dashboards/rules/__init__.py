"""How claims are judged: the rules of dashboards/claim.py, by what they look at."""
