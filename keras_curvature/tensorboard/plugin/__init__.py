"""The page "Curvature" in TensorBoard. Loaded by the server, without TensorFlow."""
