"""The parts of tensorboardX that write event files, imported without torch.

tensorboardX imports torch if it is installed, only to know its tensors. That takes seconds, so torch is hidden from it.
"""

import sys

_hides_torch = "torch" not in sys.modules
if _hides_torch:
    sys.modules["torch"] = None  # an import of torch raises ImportError, which tensorboardX expects
try:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.summary import image, scalar
finally:
    if _hides_torch:
        del sys.modules["torch"]

__all__ = ["Event", "EventsWriter", "SessionLog", "image", "scalar"]
