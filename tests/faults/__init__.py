"""What the daemon survives: each test says how often it was tried.

``make test`` runs the short form of everything here, ``make soak`` the long one, which takes hours.
"""
