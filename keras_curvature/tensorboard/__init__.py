"""What TensorBoard shows: names of the tags, event files, and a page of our own.

The room's modules are imported by name. Nothing is imported here, so that a TensorBoard
server which loads the page (`plugin/`) doesn't load TensorFlow through us.
"""
