// A StepPlan over Python's objects: reads parameter groups, state and gradients, a step in one call or in two. Used by
// module.cpp for wd_fused/backends, which keeps alive the parameters that a plan points to.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "python/objects.h"

namespace wd_fused {

class PythonPlan {
 public:
  // parameters: (parameter, momentum buffer or None, group, index) of each row. groups: the parameters of every group,
  // planned or not: a change there is noticed. The caller keeps both alive: only addresses are kept here, since owning
  // references would close a cycle that Python's garbage collector cannot see.
  // make_host(device): for a hosted target, what HostedStep calls.
  PythonPlan(const py::list& parameters, const py::list& groups, const py::dict& state, const std::string& numerics,
             const std::string& target, const py::object& make_host);

  // Takes the optimizer's state as it is now for what the plan was built on. Called when this step's own momentum
  // buffers have been put there.
  void read_state(const py::dict& state);

  // Checks everything and writes nothing. -1: the plan no longer holds, build another. Else the number of rows that it
  // leaves to others this time; left() tells which. What it read stays in memory until launch().
  int64_t prepare(const py::handle groups, const py::handle state, const py::handle options);

  const std::vector<std::pair<int64_t, std::string>>& left() const { return left_; }

  // The memory that torch's code writes beside this plan, [begin, end): whether a row of it lies there.
  bool keep_off(const std::vector<std::pair<uintptr_t, uintptr_t>>& others);

  // Forgets what prepare() read, and the memory that it holds: launch() will not come.
  void abandon() { plan_.abandon(); }

  // Between prepare() and launch(), on each device: the groups' sums of squared gradients, float64 [groups].
  std::vector<at::Tensor> sums(const py::handle grad_scale);

  // Does what prepare() checked. The momentum buffers that it made, with their rows. coefficients: of the norm, one a
  // group.
  py::list launch(const py::handle coefficients, const py::handle grad_scale);

  std::optional<at::Tensor> grad_norm() const;
  bool was_skipped() const { return was_skipped_; }

  py::list run();

  // prepare() and launch() in one, if that is all there is to do: None if it is not, and then nothing is done. Nothing
  // else runs in between, so that a short step need not hold its memory. grad_scale and found_inf, of
  // torch.amp.GradScaler, are for a plan that can read them on its device; not for a step that makes momentum buffers,
  // since only the device knows whether it will fill them.
  py::object step(const py::handle groups, const py::handle state, const py::handle grad_scale,
                  const py::handle found_inf, const py::handle options);

  // What the last step launched on GPUs: for tests and measurements.
  py::list launches() const;
  // The bytes that lie in each device's memory.
  py::list tables() const;

 private:
  // Nothing of a step that failed stays behind, such as momentum buffers for which there was memory at first.
  int64_t check(const py::handle groups, const py::handle state, const Amp& amp, const py::handle options);

  // A step that GradScaler, or we in its place, skip.
  py::object skipped();

  // wd_fused/options/spec.py's StepOptions: groups (each None or max_norm, l1, decoupled, l2, average_weight,
  // random_key, average_varies), norm_per_group, error_if_nonfinite, norm_dtype, clips. False: it is not for this plan.
  bool read_options(const py::handle options);
  static PyObject* double_dtype();

  // What programs do that replace p.data or the optimizer's state at every step. A DTensor's placements would have to
  // be looked at as well.
  bool point_anew();

  static constexpr int64_t kStale = -2;
  int64_t check_all(const py::handle groups, const py::handle state, const Amp& amp, const py::handle options);

  // Without the GIL: what waits for a GPU with it would wait for ever, if the GPU waits for another that is driven by
  // another Python thread. A launch waits when a thousand others are queued before it.
  template <class Work>
  void while_others_run(const Work& work) {
    const py::gil_scoped_release others_may_run;
    work();
  }

  bool takes_long() const;

  // On the CPU only options unscale gradients as they go.
  bool can_read(const Amp& amp) const;

  // Leaves every row to others, for one reason; launch() then does nothing.
  int64_t leave_all(const std::string& reason);
  void hold_memory();

  static std::vector<PlannedParameter> planned(const py::list& parameters);

  // --- DTensors

  const at::Tensor& param_of(size_t row) const {
    return THPVariable_Unpack(is_sharded_[row] ? local_of(rows_[row]) : rows_[row]);
  }
  const at::Tensor& gradient_of(size_t row) const {
    const at::Tensor& gradient = THPVariable_Unpack(rows_[row]).unsafeGetTensorImpl()->grad();
    if (!is_sharded_[row] || !gradient.defined()) return gradient;
    return THPVariable_Unpack(local_of(py::reinterpret_steal<py::object>(THPVariable_Wrap(gradient)).ptr()));
  }
  // Or none. One of another placement is left: FusedSGD redistributes it and comes again, or torch's code refuses it.
  bool has_gradient_of_its_placement(size_t row);
  void fetch_ahead(size_t row) const;
  bool same_groups(PyObject* groups);

  // Whether the group's keys are those that it had when this was first asked: an option is a key more.
  static bool same_keys(PyObject* group, std::vector<py::object>& seen);
  bool read_hyperparameters(PyObject* groups);

  // A tensor on the plan's own kind of device is read there, in the step; asking for its value now would wait for it.
  double number_or_tensor(PyObject* value, PyObject* name, size_t g, at::Tensor& tensor) const;

  // Walks the state in its own order, so that no tensor need be hashed, and finds the momentum buffers of the rows.
  bool read_buffers(const py::handle state);
  // Other entries than before, or in another order, as load_state_dict() makes them. Not with what only options keep:
  // that may have to be converted first.
  bool replaced_state(const py::handle state);
  bool walk_state(PyObject* state);

  // All of a parameter's state that a plan with options looks at, in one walk.
  bool read_option_state(PyObject* state_of_param, size_t row);

  struct Entry {
    PyObject* key;
    int64_t row;  // -1: not a row of this plan
    // Where its dict, the dict's entries and its momentum buffer lay in the last step. Fetched ahead, never read: they
    // may be gone by now.
    std::array<const void*, 3> places{};
  };
  std::vector<py::object> hosts_;  // of a hosted target, one a device
  StepPlan plan_;
  std::vector<PyObject*> rows_;
  std::vector<bool> is_sharded_;  // of the rows: a DTensor
  bool any_sharded_ = false;
  std::vector<py::object> gradient_specs_;  // of DTensors: of the last gradient, which was found to be the parameter's
  std::vector<size_t> sharded_written_;     // rows of the step under way
  std::unordered_map<PyObject*, int64_t> row_of_;
  std::vector<std::vector<PyObject*>> groups_;
  std::vector<std::vector<py::object>> keys_of_groups_;  // strings, which close no cycle
  std::vector<bool> group_used_;
  std::vector<Entry> entries_;
  std::vector<Hyperparameters> hyperparameters_;
  std::vector<const c10::TensorImpl*> buffers_;
  std::vector<std::array<const c10::TensorImpl*, kOptionTensors>> option_tensors_;  // if any row has options
  Norm norm_;
  std::vector<std::pair<int64_t, std::string>> left_;
  bool has_stepped_ = false;
  bool is_void_ = false;  // rows point to tensors of which it is not known how they overlap
  bool was_skipped_ = false;
};

}  // namespace wd_fused
