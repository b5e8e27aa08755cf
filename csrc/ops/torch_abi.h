// SPDX-License-Identifier: MIT
// The only torch headers of the project: the stable ABI, so that one binary runs on every torch from
// the version named here on. pybind11 comes first: the copy that some torch versions ship refuses to
// be included once a target version is defined.
#pragma once
#include <pybind11/pybind11.h>

#define TORCH_TARGET_VERSION QG_TORCH_TARGET
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
