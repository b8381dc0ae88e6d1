"""Running a program: the base method's side, the fast backend, and the dense backend everything is checked against."""
