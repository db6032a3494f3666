"""What Ray and the object store can do to us, in our words.

ClusterError
├── ClusterUnreachable        no cluster at the address, or its token is not ours
├── StoreError
│   ├── StoreUnavailable      tried until the deadline, nothing was changed as far as we know: try again
│   ├── OutcomeUnknown        a write may or may not have happened: look before writing again
│   ├── NotFound              no such object
│   ├── AccessDenied          credentials or permissions: a user must act
│   └── StoreUnsuitable       a promise that we need (put-if-absent) is not kept by this store
└── ActorError
    ├── ActorLost             the process is gone, its calls may or may not have run
    ├── ActorOutOfMemory      the node killed it for memory
    └── ActorLoadFailed       it could not be brought up
"""


class ClusterError(Exception):
    """Base of everything the ground floor raises."""


class ClusterUnreachable(ClusterError):
    pass


class StoreError(ClusterError):
    pass


class StoreUnavailable(StoreError):
    pass


class OutcomeUnknown(StoreError):
    pass


class NotFound(StoreError):
    pass


class AccessDenied(StoreError):
    pass


class StoreUnsuitable(StoreError):
    pass


class ActorError(ClusterError):
    pass


class ActorLost(ActorError):
    pass


class ActorOutOfMemory(ActorError):
    pass


class ActorLoadFailed(ActorError):
    pass
