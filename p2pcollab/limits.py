"""Every size that comes from outside has a bound here, checked before anything is allocated.

Each limit names the legitimate need, the attack that it stops, and the memory that it can cost at worst.
"""

from __future__ import annotations

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB

#: Need: 1,000 class names of 64 characters. Stops: a run spec that fills memory when it is parsed.
RUN_SPEC_BYTES_MAX: Final = 128 * KIB
#: Its lists and objects. Need: two for each of 128 tasks, and brackets in the classes' names.
RUN_SPEC_LISTS_MAX: Final = 1024
#: Its commas. Need: 1,000 classes, each in eight tasks. Stops, with the one above: tens of thousands of
#: objects that are made only to be refused.
RUN_SPEC_ITEMS_MAX: Final = 16_384
#: Need: ImageNet-1k. Stops: quadratic work in the allotment.
CLASSES_MAX: Final = 1000
#: Need: 100 classes in single-class tasks. Worst case: DEVICES_MAX * TASKS_MAX ledger entries of 4 KiB.
TASKS_MAX: Final = 128
#: Need: a large lab. Stops: a board of invented devices. Worst case: 256 device records of 8 KiB = 2 MiB.
DEVICES_MAX: Final = 256
#: Need: names that fit a table.
NAME_CHARS_MAX: Final = 64
#: Need: a device record with per-class counts and leases, about 1 KiB for 10 classes, 6 KiB for 1,000.
#: Hivemind loses dictionaries over about 4 MB silently, so records stay in the low KB.
RECORD_BYTES_MAX: Final = 8 * KIB
#: How far ahead of our clock a record may expire. Stops: records that never leave memory.
RECORD_TTL_S_MAX: Final = 600.0
#: Need: a contribution with one `seen` counter per device: 256 * 40 bytes.
CONTRIBUTION_BYTES_MAX: Final = 16 * KIB
#: Hivemind's unary calls break over about 1 MB; larger answers are sent in pages.
UNARY_BYTES_MAX: Final = 512 * KIB
#: Ledger entries in one message.
ENTRIES_PER_MESSAGE_MAX: Final = 64
#: Arrays, maps and their elements in one message. Need: a full summary, five for each entry. Stops: half a
#: million empty maps in one message.
MESSAGE_PARTS_MAX: Final = 32_768
#: Keys of a ledger in one summary: TASKS_MAX + 1 shards of a few dozen devices each; more goes in pages.
SUMMARY_ENTRIES_MAX: Final = 4096
#: Need: the stem or one branch of VGG-16, about 60 MB in fp16 when undivided. Worst case memory: one shard
#: per stream, STREAMS_MAX streams.
SHARD_BYTES_MAX: Final = 256 * MIB
#: Chunk of a stream.
CHUNK_BYTES: Final = 256 * KIB
CHUNK_BYTES_MAX: Final = 512 * KIB
#: Streams served at once: 300 gave connection resets.
STREAMS_MAX: Final = 32
#: Nonces remembered against replay, 16 bytes each plus overhead: about 10 MiB at worst.
NONCES_MAX: Final = 65_536
#: How far a peer's clock may be off before its requests are refused.
CLOCK_SKEW_S_MAX: Final = 300.0
#: Need: a phone's photograph. Stops: decompression bombs in a data folder.
IMAGE_PIXELS_MAX: Final = 64_000_000
#: Need: a word with some silence around it. Stops: an hour's recording of which the middle second is taken
#: for an example, and whose compressed form is decoded up to there.
CLIP_S_MAX: Final = 60
#: Need: a minute of eight channels at 192 kHz in 32 bits; ten minutes of background noise.
AUDIO_FILE_BYTES_MAX: Final = 512 * MIB
#: Sample rates and channels from telephones to studios. A clip of 10 s is 60 MiB at worst, in each thread.
AUDIO_RATE_HZ_MIN: Final = 4_000
AUDIO_RATE_HZ_MAX: Final = 192_000
AUDIO_CHANNELS_MAX: Final = 8
#: Need: the lists of Speech Commands name 11,005 clips in 300 KB.
SPLIT_LIST_BYTES_MAX: Final = 16 * MIB
#: Need: backgrounds that differ. Each is as large as a clip, usually 4 KB.
NOISE_CLIPS_MAX: Final = 256
#: Need: the spectrograms of all of Speech Commands, 105,829 of 4,000 bytes, for more runs than one.
FEATURE_CACHE_BYTES_MAX: Final = 2 * 1024 * MIB
#: A batch of images in `predict`.
PREDICT_IMAGES_MAX: Final = 10_000
#: Events kept on disk and in memory. Need: what happened over night. Worst case: 10,000 rows of 1 KiB.
EVENTS_MAX: Final = 10_000
#: Refused contributions that the status names. Need: what is wrong now; the events have the rest.
REFUSALS_SHOWN_MAX: Final = 32
#: Devices that one contribution names as liars. Need: a minority of a run that people set up.
DISTRUSTS_MAX: Final = 32
#: Contributions that a device remembers its judgement of. Need: the newest and the one before it of each
#: device and shard of a run of a household or a class. Worst case: 1 MiB.
OPINIONS_MAX: Final = 4096
#: Points of the metrics history. Need: 128 shards with a few hundred leases each.
METRICS_MAX: Final = 50_000
#: Body of a request to the loopback API; all of them are small JSON objects.
API_BODY_BYTES_MAX: Final = 64 * KIB
#: Long polls for events at once on the loopback API.
API_WAITERS_MAX: Final = 16
#: Longest wait of one long poll.
API_WAIT_S_MAX: Final = 30.0
#: Need: VGG-16 undivided in fp32 (about 540 MB) as one assembled model.
MODEL_BYTES_MAX: Final = 1024 * MIB
#: Header of a model file: the run spec, and 128 shards with contributor and digest for each of 256 devices.
MODEL_HEADER_BYTES_MAX: Final = 4 * MIB
#: Its lists and objects. Need: three for each of 100 tensors in 128 shards.
MODEL_HEADER_LISTS_MAX: Final = 65_536
#: Its commas. Need: seven for each of these tensors, and two for each contributor and digest. Worst case,
#: with the one above: 40 MiB of small objects, where brackets alone made 130.
MODEL_HEADER_ITEMS_MAX: Final = 262_144
#: One message between the daemon and its trainer: a shard, or an assembled model, and its description.
TRAINER_FRAME_BYTES_MAX: Final = MODEL_BYTES_MAX + MIB
#: Held-out examples on which a lease's result is tried: 256 give a standard error of at most 3 points.
VALIDATION_EXAMPLES_MAX: Final = 256
#: Stems' features of the examples that others' work is tried on, in the trainer's memory; on small devices a
#: part of it (`daemon.workshop`). In bfloat16, AlexNet's of 400 images of 32x32 pixels take 12 MiB, of 400
#: spectrograms 49 MiB. About four stems are looked at in turn: two that are compared, and those that branches
#: on their way were trained on. With room for fewer, what is needed next is what was just forgotten.
TRIED_FEATURES_BYTES_MAX: Final = 192 * MIB
#: Need: 1,000,000 images of 64x64 pixels. Stops: a folder that fills the memory until the trainer dies.
DATASET_BYTES_MAX: Final = 16 * 1024 * MIB
#: Generations, samples, beats and sequence numbers. Stops: integers that neither SQLite nor float64 holds.
COUNT_MAX: Final = 10**15
#: Addresses that a device record may name: a few interfaces, IPv4 and IPv6.
ADDRESSES_MAX: Final = 8
#: Need: /ip6/…/tcp/…/p2p/… is about 110 characters.
ADDRESS_CHARS_MAX: Final = 160
#: Text of an error reply: one line for a log.
ERROR_TEXT_CHARS_MAX: Final = 200
#: Peers whose addresses are remembered: DEVICES_MAX, and some that went away. Stops: floods of announcements.
ADDRESS_BOOK_PEERS_MAX: Final = 2 * DEVICES_MAX
#: Announcements found by zeroconf and not yet looked at; the next query brings what was dropped again.
ANNOUNCEMENTS_MAX: Final = 256
#: Devices that a run has shut out, ever. Need: a lost laptop, a friend who moved away.
FORGOTTEN_MAX: Final = 256
#: A rotation notice: a key and a box for each of 256 devices, and the ids of 256 forgotten ones.
NOTICE_BYTES_MAX: Final = 32 * KIB
#: How many rotations a device can have missed. Stops: an epoch after which there is none.
EPOCHS_AHEAD_MAX: Final = 1000
#: Run secrets of before that are recognised. Each costs one MAC more for every request of a stranger.
RETIRED_SECRETS_MAX: Final = 4
#: Kinds of things that mDNS has told and zeroconf keeps until they expire, up to 75 minutes. Need: five for
#: each of DEVICES_MAX, and what else is announced on a LAN. Stops: a flood of announcements that fills
#: memory.
MDNS_RECORDS_MAX: Final = 8192
#: Announced addresses tried at a time; each takes a few seconds at worst.
ADDRESSES_TRIED_AT_ONCE: Final = 32
