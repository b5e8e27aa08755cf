// SPDX-License-Identifier: MIT
// Every format that can be written: include this to have all specialisations of Encoder<F>.
#pragma once
#include "encode_fp4_ternary.h"
#include "encode_k.h"
#include "encode_legacy.h"
