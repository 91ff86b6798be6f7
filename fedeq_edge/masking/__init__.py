"""Pairwise-masked secure aggregation: the server learns the sum of integer vectors and no vector (extra "masking").

Source: Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning, CCS 2017. Sans-IO.

Theory of operation
-------------------
Devices i and j agree on a mask m_ij, and every device draws a mask b_i of its own. The server gets

    y_i = x_i + b_i + sum_{j > i} m_ij - sum_{j < i} m_ij    modulo 2^bits,

and in the sum the pairwise masks of those who arrived cancel. To take out the rest, every device has shared two
secrets among all (Shamir): that of b_i and its private key of the m_ij. In the last step a quorum reveals the first
for those who arrived and the second for those who dropped out. Nobody reveals both for the same device: with both, a
vector that comes late, or was said to be lost, could be unmasked alone. Sums of integers are exact, so the result has
the bits of a sum made in the open, whoever dropped out.

Whom it protects from whom. The server is honest but curious: it follows the protocol and looks at everything, also
together with devices below the quorum. A malicious server could hand out keys of its own making in place of those of
the other devices and so read each vector; an Identity, by which devices check each other's keys against the fleet's
certificates, takes that away. One that names different survivors to different devices gets both secrets of nobody
unless 2 quorum - n devices are on its side: the quorum is above a half. What the sum itself tells, it tells: a sum of
n - 1 accomplices and one victim is the victim's vector. A malicious device can spoil the sum, as nobody sees what it
adds: norm bounds and robust fusion do not work on masked vectors.
"""

from fedeq_edge.masking.device import MaskingDevice
from fedeq_edge.masking.identity import CertificateIdentity, Identity
from fedeq_edge.masking.messages import (
    Delivery,
    Keys,
    Masked,
    Member,
    Message,
    Reveal,
    Roster,
    Shares,
    Survivors,
    decode,
    encode,
)
from fedeq_edge.masking.server import MaskedSum, MaskingServer
from fedeq_edge.masking.terms import Terms

__all__ = [
    "CertificateIdentity",
    "Delivery",
    "Identity",
    "Keys",
    "Masked",
    "MaskedSum",
    "MaskingDevice",
    "MaskingServer",
    "Member",
    "Message",
    "Reveal",
    "Roster",
    "Shares",
    "Survivors",
    "Terms",
    "decode",
    "encode",
]
