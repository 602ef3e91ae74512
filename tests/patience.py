"""How long tests wait for other processes."""

#: In seconds: a machine that is busy is no failure, one that hangs is.
PATIENCE = 1_200
