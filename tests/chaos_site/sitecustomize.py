"""On the path of a run's processes in which the library is to be broken on purpose (`mutations`)."""

import mutations

mutations.arm()
