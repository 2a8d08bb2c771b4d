#pragma once

// All public headers: operators, modules and reference implementations.

#include <posenc/alibi.h>
#include <posenc/alibi_attention.h>
#include <posenc/attention.h>
#include <posenc/context_parallel_alibi_attention.h>
#include <posenc/context_parallel_attention.h>
#include <posenc/frequencies.h>
#include <posenc/logging.h>
#include <posenc/modules/alibi_bias.h>
#include <posenc/modules/qk_norm_rotary_embedding.h>
#include <posenc/modules/rotary_embedding.h>
#include <posenc/pair_axes.h>
#include <posenc/positions.h>
#include <posenc/qk_norm_rotary_embedding.h>
#include <posenc/reference.h>
#include <posenc/rotary_embedding.h>
#include <posenc/version.h>
