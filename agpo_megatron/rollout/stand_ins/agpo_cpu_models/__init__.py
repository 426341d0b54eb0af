"""The architectures of this project, for SGLang's ``SGLANG_EXTERNAL_MODEL_PACKAGE``.

With that variable set SGLang imports its 150 other model files only when an architecture is not found here, which takes
seconds off every start of a server.
"""
